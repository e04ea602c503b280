"""配方是什么：schema、读 YAML、``extends`` 与 ``--set``、run 目录、信任谁。

只导入根上的零件；不导入 torch。
"""
