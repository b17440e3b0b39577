"""Tests of the examples that the guides quote."""
