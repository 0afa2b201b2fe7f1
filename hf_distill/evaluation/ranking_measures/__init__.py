"""A metric for `evaluate.load`: this folder, or a Space made of its files. See [`metric_folder`]."""
