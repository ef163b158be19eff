"""Rewards: functions of a sample, one file each."""
