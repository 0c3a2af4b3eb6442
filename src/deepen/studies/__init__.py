"""Studies: many results, each a target of its configuration.

A *cell* is one result: what is to be computed, and a key, the digest of everything that decides it. Missing
cells are computed, finished ones never again; a table is made of finished ones only. What a cell computes is
its study's business (`deepen.studies.cells`); how cells are kept, locked and run is the same for all
(`deepen.studies.engine`).
"""
