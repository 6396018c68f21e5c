"""Calibration of one die: a digital correction beside its fixed weights, fitted and written.

`pfmc.calibration.calibrate.calibrate` does it; `pfmc.calibration.notice` warns of other dies.
"""
