"""与 Hugging Face 目录互相转换，从教师里挑层，model card。

可以导入 ``generate`` 以下。
"""
