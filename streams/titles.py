"""Words of the synthetic catalogue: Chinese and English titles by topic, no two alike.

Knows no clicks; `synthetic.py` says which items there are.
"""

TOPICS = (
    ("新能源汽车", "Electric cars"),
    ("半导体", "Semiconductors"),
    ("房地产", "Housing"),
    ("央行", "Central banks"),
    ("太空探索", "Space flight"),
    ("足球", "Football"),
    ("网球", "Tennis"),
    ("人工智能", "Machine learning"),
    ("云计算", "Cloud computing"),
    ("手机", "Phones"),
    ("电影", "Cinema"),
    ("古典音乐", "Classical music"),
    ("摄影", "Photography"),
    ("烹饪", "Cooking"),
    ("咖啡", "Coffee"),
    ("茶", "Tea"),
    ("登山", "Mountaineering"),
    ("马拉松", "Marathon running"),
    ("自行车", "Cycling"),
    ("园艺", "Gardening"),
    ("建筑", "Architecture"),
    ("时装", "Fashion"),
    ("教育", "Schools"),
    ("医疗", "Hospitals"),
    ("疫苗", "Vaccines"),
    ("气候", "Climate"),
    ("水利", "Rivers and dams"),
    ("高铁", "Fast trains"),
    ("航空", "Aviation"),
    ("港口", "Ports"),
    ("能源", "Power grids"),
    ("农业", "Farming"),
    ("历史", "History"),
    ("考古", "Archaeology"),
    ("天文", "Astronomy"),
    ("数学", "Mathematics"),
    ("象棋", "Chess"),
    ("电子游戏", "Video games"),
    ("旅行", "Travel"),
    ("宠物", "Pets"),
)

_ANGLES = (
    ("新规落地", "new rules take effect"),
    ("价格回落", "prices come down"),
    ("一线观察", "a view from the ground"),
    ("入门指南", "a beginner's guide"),
    ("十年回顾", "ten years on"),
    ("谁在投资", "who is investing"),
    ("争议再起", "the old dispute returns"),
    ("专家解读", "experts explain"),
    ("数据背后", "behind the figures"),
    ("未来三年", "the next three years"),
    ("被忽视的问题", "the overlooked problem"),
    ("年度盘点", "the year in review"),
    ("小城故事", "a small-town story"),
    ("纪录刷新", "a record falls"),
    ("青年一代", "the young generation"),
    ("失败的教训", "lessons from a failure"),
)

_PLACES = (
    ("北京", "Beijing"),
    ("上海", "Shanghai"),
    ("广州", "Guangzhou"),
    ("深圳", "Shenzhen"),
    ("成都", "Chengdu"),
    ("西安", "Xi'an"),
    ("杭州", "Hangzhou"),
    ("武汉", "Wuhan"),
    ("里斯本", "Lisbon"),
    ("柏林", "Berlin"),
    ("内罗毕", "Nairobi"),
    ("利马", "Lima"),
    ("东京", "Tokyo"),
    ("首尔", "Seoul"),
    ("悉尼", "Sydney"),
    ("奥斯陆", "Oslo"),
    ("孟买", "Mumbai"),
    ("开罗", "Cairo"),
    ("多伦多", "Toronto"),
    ("都柏林", "Dublin"),
    ("华沙", "Warsaw"),
    ("雅典", "Athens"),
    ("河内", "Hanoi"),
)

NUM_PLAIN = len(_ANGLES) * len(_PLACES)
"""Titles per topic and language before a part number is added."""


def title(topic: int, number: int, *, chinese: bool) -> str:
    """Title of a topic's item; distinct for every (topic, number, language)."""
    part, place_angle = divmod(number, NUM_PLAIN)
    # 23 places and 16 angles have no common divisor: all pairs come before one is repeated.
    zh_place, en_place = _PLACES[place_angle % len(_PLACES)]
    zh_angle, en_angle = _ANGLES[place_angle % len(_ANGLES)]
    zh_topic, en_topic = TOPICS[topic]
    if chinese:
        return f"{zh_topic}：{zh_place}{zh_angle}" + (f"（{part + 1}）" if part else "")
    return f"{en_topic} in {en_place}: {en_angle}" + (f" ({part + 1})" if part else "")
