"""The same loss, computed in different ways; `rcl_fast.functional` picks one."""
