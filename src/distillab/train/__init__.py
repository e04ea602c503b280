"""训练循环与它留下的东西：on-policy 采样、装载、验证、检查点、指标、profile。

可以导入 ``teachers`` 以下。
"""
