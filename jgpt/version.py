"""The version of jgpt. Beside the data path: rooms that write it down import it from here."""

__version__ = "0.1.0"
