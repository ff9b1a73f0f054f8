"""Two CPU devices for every test, and no silent rank promotion; set before any test touches a device."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
