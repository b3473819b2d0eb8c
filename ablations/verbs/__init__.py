"""The smaller commands, ``python -m ablations VERB``: each a module with NAMES, HELP, Settings and ``run``."""
