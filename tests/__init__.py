"""Tests of objectcompose; the folders mirror the rooms of the package."""
