"""The vocabulary that the rule-made data is written with."""

KINDS = {
    "animal": ["dog", "cat", "horse", "cow", "sheep", "goat", "mouse", "bear", "wolf", "fox"],
    "fruit": ["apple", "pear", "plum", "cherry", "lemon", "grape", "peach", "melon", "fig", "orange"],
    "colour": ["red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple"],
    "tool": ["hammer", "saw", "drill", "axe", "spade", "rake", "knife", "brush", "needle", "wrench"],
    "garment": ["hat", "coat", "shirt", "sock", "shoe", "glove", "scarf", "belt", "dress", "cap"],
    "vehicle": ["car", "bus", "train", "ship", "boat", "truck", "bike", "plane", "tram", "sled"],
    "plant": ["rose", "tulip", "oak", "pine", "fern", "moss", "ivy", "daisy", "lily", "birch"],
    "food": ["bread", "cheese", "rice", "soup", "cake", "butter", "pasta", "honey", "salt", "egg"],
}

NOUNS = [noun for nouns in KINDS.values() for noun in nouns]

OPPOSITES = [
    *[("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("good", "bad"), ("high", "low")],
    *[("wet", "dry"), ("hard", "soft"), ("light", "dark"), ("long", "short"), ("full", "empty"), ("rich", "poor")],
    *[("loud", "quiet"), ("clean", "dirty"), ("early", "late"), ("open", "closed"), ("strong", "weak")],
    *[("happy", "sad"), ("thick", "thin"), ("wide", "narrow"), ("sweet", "sour"), ("near", "far"), ("up", "down")],
    *[("day", "night"), ("summer", "winter"), ("north", "south"), ("east", "west"), ("left", "right")],
    *[("win", "lose"), ("buy", "sell")],
]

NAMES = [
    "Anna",
    "Tom",
    "Mia",
    "Ben",
    "Lena",
    "Paul",
    "Emma",
    "Max",
    "Ida",
    "Leo",
    "Nora",
    "Jan",
    "Ella",
    "Finn",
    "Clara",
    "Otto",
]

COUNTS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
