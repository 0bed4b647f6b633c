"""What float32 computes in vectors of 512 bits: products and attention. Compiled where a processor has them."""

from __future__ import annotations

from . import attention_float32, products_float32
from .start import compile_all
from .tiles import has_vectors

attention_fwd, attention_bwd = attention_float32.attention_fwd, attention_float32.attention_bwd
LEAST, multiply = products_float32.LEAST, products_float32.multiply

if has_vectors():
    compile_all([*products_float32._kernels, *attention_float32._kernels], __name__, 20)
