"""Attention kernels of our own: CUDA sources, the PTX that was built from them, their launch, and JAX functions.

In the data path: see `attention.py`. Nothing here imports the rest of jgpt.
"""

from .attention import flash, flash_qkv, supports
from .launch import FlashUnavailable, check

__all__ = ["FlashUnavailable", "check", "flash", "flash_qkv", "supports"]
