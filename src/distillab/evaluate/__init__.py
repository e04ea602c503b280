"""``distillab evaluate`` 与任务：谁读哪些 token，逐行打分，带区间的数字，lm-evaluation-harness。

可以导入 ``assembly`` 以下。
"""
