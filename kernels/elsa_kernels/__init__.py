"""Exact attention kernels on the monoid (m, S, W). Imports with torch and triton alone."""
