"""What is measured, by subject: `python -m bench.SUBJECT.SCRIPT --help`, in the root, rcl_fast installed editable."""
