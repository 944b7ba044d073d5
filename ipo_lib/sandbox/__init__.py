"""The sandbox: a small invented world with an exact judge, and models that were trained in it."""
