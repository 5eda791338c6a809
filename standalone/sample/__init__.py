"""A week of an invented company's use of language models: a log to try the analysis on, and the script that made it."""

from pathlib import Path

FILE = Path(__file__).parent / "usage.csv"
