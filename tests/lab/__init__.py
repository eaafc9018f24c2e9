"""The lab: isolated network namespaces in which real tools attack real servers, recorded with labels.

It is the source of the small capture that ships with the project and of every test that needs real packets. Rules:

- nothing leaves the namespaces, and nothing of the host's own network, files or accounts is touched;
- every tool run is bounded in count and in time;
- whatever was started or made is gone when the ``Lab`` is left, also after a failure or Ctrl-C.

Only the standard library is used here, so that the lab can judge the product without sharing its mistakes.
"""
