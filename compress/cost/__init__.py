"""What a site costs on a device: milliseconds, millijoules and bytes at every number of units.

`latency_table` holds measured times and prices options from them; where nothing was measured, `roofline`
estimates from the facts of the device's profile, and `published_latencies` states how far off that is.
`energy` reads power counters. It may import `ir`, `artifacts`, `profiles`, `sites.kinds` and `measure`,
never torch. Operators that only one kind of site runs are described in `sites.kinds`, not here.
"""
