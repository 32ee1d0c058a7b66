"""Bases, tokenizers, output heads and adapters."""
