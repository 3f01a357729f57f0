"""python -m app score: files of items → verdicts, by the code that answers requests and without HTTP."""
