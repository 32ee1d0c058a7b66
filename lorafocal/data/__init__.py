"""Preference data: rows of files to preferences, preferences to tokens, tokens to packs."""
