"""What the package costs, beside hand-written floors measured in the same run: `make bench`."""
