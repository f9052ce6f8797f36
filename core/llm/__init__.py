"""core.llm"""
