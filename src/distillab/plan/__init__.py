"""``distillab plan``：由形状算出显存与运算量，放不放得下，改什么。

可以导入根上的零件、``config``、``models`` 与 ``data`` 里读文件的部分；不导入 torch。
"""
