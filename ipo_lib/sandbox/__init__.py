"""The sandbox: a small invented world with an exact judge, and the model organisms that live in it."""
