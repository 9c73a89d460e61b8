"""Everything the controller knows, as an index: three verbs change it and say which subjects changed, questions are answered from it. Pure.

`policy.index.index.Index` is the whole interface. Answers are computed when asked and remembered per namespace, so that applying an
object costs what it changes and not what there is.
"""

from policy.index.index import Index
from policy.index.keys import IpKey, Key, PodKey
from policy.index.settings import IndexSettings

__all__ = ["Index", "IndexSettings", "IpKey", "Key", "PodKey"]
