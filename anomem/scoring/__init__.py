"""Filled memories: prototypes chosen among the features of normals, their scores, and the decision."""
