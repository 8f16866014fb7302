"""Collection for the whole repository: the root links lead to packages that are collected under their own names."""

collect_ignore = ["planner", "executors"]
