"""What each operation does to axes: the table, and the rows that come with the package."""

from merak_like.partitioner.tensor_parallel.rules import contract, elementwise, indexing, views, whole
from merak_like.partitioner.tensor_parallel.rules.table import RULES, Rule, register

__all__ = ["RULES", "Rule", "contract", "elementwise", "indexing", "register", "views", "whole"]
