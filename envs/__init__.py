"""Environments: a generation task is a set of contexts and a reward."""

if __name__ != "flowrl.envs":
    raise ImportError("Import this package as 'flowrl.envs' (it installs under that name), not as 'envs'.")
