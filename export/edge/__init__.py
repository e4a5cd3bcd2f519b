"""Bundles for a device that is not this machine, and the measurements that come back.

`bundle` writes both models, inputs and the script `verify.py` into one folder; `bundle_schema` describes its
documents; `merge` checks a measurement and turns it into a verdict. It may import `measure`, `report` and the
rest of `export` but `delivery`. Anything that runs on the device belongs in `compress.measure` and imports
only numpy.
"""
