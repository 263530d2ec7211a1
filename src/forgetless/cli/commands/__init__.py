"""What the verbs for single stages do: statistics, a start, scores, an export.

They take values and give results; the command line reads the words and prints.
"""
