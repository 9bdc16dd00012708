// `FOLDER`: the golden check of the app whose files lie in this folder.
import Foundation

do { print(try GoldenCheck(bundle: Bundle(path: CommandLine.arguments[1])!).run()) } catch { print("error: \(error)") }
