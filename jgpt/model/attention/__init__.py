"""Attention in its forms: plain, chunked, fused."""
