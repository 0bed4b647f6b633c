"""apr: pretrain and fine-tune decoder language models with mathematics written by hand."""

__version__ = "0.1.0"
