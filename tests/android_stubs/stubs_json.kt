package org.json

class JSONObject(text: String) {
    fun getString(name: String): String = TODO(name)
    fun getDouble(name: String): Double = TODO(name)
    fun getJSONObject(name: String): JSONObject = TODO(name)
    fun getJSONArray(name: String): JSONArray = TODO(name)
}

class JSONArray {
    fun length(): Int = TODO()
    fun getLong(index: Int): Long = TODO("$index")
    fun getDouble(index: Int): Double = TODO("$index")
}
