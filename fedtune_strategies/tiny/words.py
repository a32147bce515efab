"""The vocabulary that the rule-made data is written with."""

KINDS = {
    "animal": ["dog", "cat", "horse", "cow", "sheep", "goat", "mouse", "bear"],
    "fruit": ["apple", "pear", "plum", "cherry", "lemon", "grape", "peach", "melon"],
    "colour": ["red", "blue", "green", "yellow", "black", "white", "brown", "pink"],
    "tool": ["hammer", "saw", "drill", "axe", "spade", "rake", "knife", "brush"],
    "garment": ["hat", "coat", "shirt", "sock", "shoe", "glove", "scarf", "belt"],
    "vehicle": ["car", "bus", "train", "ship", "boat", "truck", "bike", "plane"],
}

NOUNS = [noun for nouns in KINDS.values() for noun in nouns]

OPPOSITES = [
    *[("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("good", "bad"), ("high", "low")],
    *[("wet", "dry"), ("hard", "soft"), ("light", "dark"), ("long", "short"), ("full", "empty"), ("rich", "poor")],
    *[("loud", "quiet"), ("early", "late"), ("open", "closed"), ("strong", "weak"), ("happy", "sad")],
    *[("near", "far"), ("up", "down"), ("left", "right")],
]

NAMES = ["Anna", "Tom", "Mia", "Ben", "Lena", "Paul", "Emma", "Max", "Ida", "Leo", "Nora", "Jan"]

COUNTS = ["one", "two", "three", "four", "five"]

NUMBERS = range(1, 41)
