"""The tests run against the installed wheel, on real databases and real servers."""
