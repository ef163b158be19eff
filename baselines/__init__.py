"""Baseline algorithms, one file each."""

if __name__ != "flowrl.baselines":
    raise ImportError("Import this package as 'flowrl.baselines' (it installs under that name), not as 'baselines'.")
