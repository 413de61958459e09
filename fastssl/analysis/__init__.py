"""What a trained backbone has learnt, beyond an accuracy: one number or picture a file.

Each file has a function that computes from arrays or modules, without a run folder, and a
`draw`, which makes a figure of what was computed. fastssl/evaluations/analyze.py calls them.
"""
