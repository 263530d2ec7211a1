"""`python benchmarks/larger_study` is the command of `study.py`."""

from study import main

main()
