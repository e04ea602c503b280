"""``python -m distillab``，供 ``accelerate launch -m distillab`` 使用。"""

from .cli import main

main()
