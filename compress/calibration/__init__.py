"""Statistics on calibration data: moments, ranges and saliency, also for models larger than memory.

It imports `core`, `distributed`, `sites` and `tasks`. A new statistic is a module with `collect`,
which writes one file per site, and `read`, which returns its content.
"""
