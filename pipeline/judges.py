"""stub"""
def check_judge_name(name: str) -> str | None:
    return None
