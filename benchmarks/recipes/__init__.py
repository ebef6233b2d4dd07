"""Recipes: each method trained and measured beside its ablations and rivals on the toybox, one command per paper."""
