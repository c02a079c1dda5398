"""The example family of docs/adding_a_family.md: the guide's code is this code (``tests/models/guide_test.py``)."""
