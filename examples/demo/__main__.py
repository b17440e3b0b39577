"""Serve the bank and its page until Ctrl-C."""

from examples.demo.app import create_app
from examples.quickstart import GUIDE, serve

if __name__ == "__main__":
    serve(create_app, GUIDE.replace("/docs", "/"))
