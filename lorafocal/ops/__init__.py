"""Kernels, each fast operation beside its slow, public definition."""
