"""Timing on this machine and on devices, and the statistics of timings and of scores.

`timing` times models in turn; `intervals` computes every interval and quantile in the product, with numpy
alone, since it is copied into edge bundles beside `verify_on_device`. It may import `errors` and `ir`. A new
statistic is a function in `intervals`.
"""
