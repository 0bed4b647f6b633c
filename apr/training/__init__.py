"""The training job: settings, the loop, checkpoints, metrics, pictures."""
